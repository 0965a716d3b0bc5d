"""What a method is made of: parts, states, messages, schedules. It imports no other room."""
