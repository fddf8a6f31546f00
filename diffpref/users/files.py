"""What lies in the folder of a run that was trained for users."""

ADAPTER, ENCODER = "user_adapter.safetensors", "user_encoder"  # a file, a folder
