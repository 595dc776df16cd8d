"""What an operator asks of both domains: is the data right, is the set-up right, what may go."""
