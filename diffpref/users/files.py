"""What lies in the folder of a run; torch-free, for those who only look."""

LORA = "pytorch_lora_weights.safetensors"  # as diffusers names it
ADAPTER, ENCODER = "user_adapter.safetensors", "user_encoder"  # a file, a folder
