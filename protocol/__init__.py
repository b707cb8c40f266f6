"""The private inference protocol: pure computation over abstract channels, without sockets or files of its own."""

import logging
import os
import sys

# TLS 1.3 only: gRPC offers no setting for it, but its TLS 1.2 is left without a usable cipher suite. It looks when it is first imported.
_SUITES = "ECDHE-PSK-AES128-CBC-SHA"
if "grpc" in sys.modules and os.environ.get("GRPC_SSL_CIPHER_SUITES") != _SUITES:
    logging.getLogger("relucent").warning("grpc was imported before Relucent, so links may fall back to TLS 1.2; import Relucent first")
os.environ["GRPC_SSL_CIPHER_SUITES"] = _SUITES
