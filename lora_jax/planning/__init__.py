"""Will it fit: train steps compiled for devices that are not here."""
