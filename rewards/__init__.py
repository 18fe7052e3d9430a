"""Rewards: answers and masks are turned into named reward terms and their weighted sum. numpy only, no torch."""
