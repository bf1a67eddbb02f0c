"""Where containers run. Each backend is the only module that imports its client library."""
