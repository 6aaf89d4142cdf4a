"""`dpo-fast bench`: what training costs on the user's own data, measured, and which settings to take."""
