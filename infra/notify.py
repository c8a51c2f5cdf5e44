"""Who is told of a retrain that fails, dies or never starts, and of an old champion: an automation of Prefect's server.

``WAV_NOTIFY=TYPE/NAME`` names a notification block of the server (e-mail, Slack, Teams, a webhook of your own), which
holds the address and its secrets; ``make deploy`` makes the automation that writes to it (docs/operations.md).
"""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from flows.housekeeping import STALE
from wav.errors import ServiceError

VARIABLE = "WAV_NOTIFY"
AUTOMATION = "wav: tell of failed retrains and old champions"
#: a run whose worker died becomes Crashed by the automation of infra/deploy.py, which this one sees too; one that
#: nobody takes when its time has come becomes Late by the server itself
EVENTS = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.Late", STALE}
FLOW = "retrain"
BODY = (
    "{% if event.payload.text %}{{ event.payload.text }}{% else %}retrain {{ flow_run.name }} is "
    "{{ flow_run.state.name }}: {{ flow_run.state.message or 'no worker took it; one is down or busy' }}{% endif %} "
    "{{ flow_run|ui_url }}"
)


def automation(block: UUID) -> AutomationCore:
    """Write to a notification block at once, one message an event."""
    return AutomationCore(
        name=AUTOMATION,
        description="A retrain failed, crashed or did not start, or left a champion that is older than stale_days.",
        trigger=EventTrigger(
            expect=EVENTS,
            match_related=ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": FLOW}),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[SendNotification(block_document_id=block, subject=f"wav: {FLOW}", body=BODY)],
    )


def find_block(client: SyncPrefectClient, name: str) -> UUID:
    """The block that ``WAV_NOTIFY`` names; ServiceError where it is not TYPE/NAME, or the server has no such block."""
    kind, slash, own = name.partition("/")
    try:
        if slash:
            return client.read_block_document_by_name(own, kind).id
    except ObjectNotFound:
        pass
    raise ServiceError(
        f"{VARIABLE} = {name!r}: the Prefect server has no such block; give TYPE/NAME, such as slack-webhook/ops, of "
        "one that you made in its UI under Blocks"
    )
