"""What DoRA, VeRA, aLoRA, trained rows and dropout each add to a product."""
