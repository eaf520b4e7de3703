"""FlatKFAC and NeuronPruner inside other libraries' training loops; a file for each library, which it imports."""
