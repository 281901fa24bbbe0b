"""Following parameters through a traced function to the products that use them."""
