"""What happens to a delivery, from admission to its recorded end."""
