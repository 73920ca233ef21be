"""Training of video language models on conversations: the tasks vamba-pretrain, vamba-sft and bimba-sft."""
