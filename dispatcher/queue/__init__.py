"""The queue's truth in Redis. Only this package imports redis."""
