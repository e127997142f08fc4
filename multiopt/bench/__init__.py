"""What a benchmark needs: parameters, sides timed in turn, and a description of the machine."""
