"""The HTTP side: the application with its errors (app), routes, the guard in front of them, the
models that are served, texts to tokens (text), pictures, metrics, logs and traces (telemetry)."""
