"""The private inference protocol: pure computation over abstract channels, without sockets or files of its own."""
