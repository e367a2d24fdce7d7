"""What a network costs and how well it does: counted, timed, written down."""
