"""What a text does to experts, what that says of their importance, and who goes low by it."""
