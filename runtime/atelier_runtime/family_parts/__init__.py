"""What several families have in common: one module for each network, encoder or way of showing frames that they share."""
