"""Nothing asks the network; libraries read this when they are imported, so it comes before all of them."""

import os

os.environ.update(HF_HUB_OFFLINE="1", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
