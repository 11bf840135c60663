"""What a run would cost (plan=true): memory, speed, days, disk."""
