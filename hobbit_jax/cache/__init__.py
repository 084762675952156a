"""The room that decides which experts are on the device, and puts them there."""
