"""Budgets that follow the mass a query would drop: as few blocks as keep it below a limit."""
