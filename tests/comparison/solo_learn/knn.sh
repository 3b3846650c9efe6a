python3 main_knn.py --dataset custom --train_data_path photos/train --val_data_path photos/val --batch_size 16 \
  --pretrained_checkpoint_dir trained_models/simclr/RUN --k 20 --temperature 0.1 --feature_type backbone \
  --distance_function cosine
