"""What `peft` and `models` share: tensor names and axes, safetensors and GGUF files."""
