"""Result files, timing, what every question needs."""
