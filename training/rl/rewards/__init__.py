"""What a completion is worth: functions of the user, reward models, classifiers."""
