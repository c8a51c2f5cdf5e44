"""An exported policy behind a port: openpi's websocket protocol, a session per connection, requests planned in batches.

``wav serve EXPORT`` runs :func:`wav.serving.server.serve`. :mod:`~wav.serving.wire` reads and writes messages,
:mod:`~wav.serving.requests` makes an observation of one, :mod:`~wav.serving.batches` plans what waits.
"""
