"""Video-text retrieval: VideoMamba and BERT in two halves, the published weights of video_mm, words, scores and ranks."""
