"""Measuring: latency and traffic of the real processes, beside plaintext and CrypTen."""
