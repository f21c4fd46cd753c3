from lalora_flwr.ground.extras import tame_bitsandbytes

tame_bitsandbytes()  # before any module here imports PEFT
