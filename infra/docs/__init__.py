"""What the docs are made of beside their pages: pictures drawn from the code, reference pages written from it.

``mkdocs.yml`` names :mod:`infra.docs.hooks`; ``make docs`` builds the site.
"""
