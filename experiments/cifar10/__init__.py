"""A Swin transformer pretrained on CIFAR-10's animals, to be fine-tuned privately on its vehicles."""
