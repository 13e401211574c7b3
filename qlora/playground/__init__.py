"""The playground: base and adapter side by side on a page in the browser. Nothing leaves this machine."""

import os

# Read when gradio is imported: it counts users and looks for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# It asks its own server whether it answers; a proxy that serves the web does not know this machine's.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost")))
