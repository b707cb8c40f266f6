"""The server and the dealer: thin gRPC edges around `protocol`."""
