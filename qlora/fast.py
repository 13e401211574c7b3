def speed_up(model): return "PEFT's own"
