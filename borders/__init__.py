"""What comes from outside and goes out to others: how much a file may ask for, and texts on each way out."""
