"""One Prefect flow per stage: ``python -m flows.<stage>`` is the command of the DVC stage of that name.

A flow reads the settings, calls the library and publishes what came out; there is no mathematics here. Importing the
package fills in the local services' addresses (``make up``), because Prefect reads its environment when it is imported.
It also ties the process to the ``dvc repro`` or the worker that started it: were that one killed, the flow would go on
beside the next run of the same stage.
"""

import os

from wav.local import adopt_local_services
from wav.processes import end_with_starter

end_with_starter("DVC_STAGE", "dvc")
end_with_starter("WAV_WORKER", "infra.deploy")
adopt_local_services()
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "wav")  # the library's logging appears on the flow run
# The plugin is for the command line (wav/prefect_plugin.py); Prefect runs plugins in an event loop at every import.
os.environ.setdefault("PREFECT_PLUGINS_ENABLED", "false")
