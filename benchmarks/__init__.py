"""What the project costs in time and memory, measured. Each script says what it prints and how."""
