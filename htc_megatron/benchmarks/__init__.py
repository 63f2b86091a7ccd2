"""Measurements that tools/benchmark.py prints; nothing else imports them."""
