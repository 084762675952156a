"""The dense part as Flax modules on the device, or on several."""
