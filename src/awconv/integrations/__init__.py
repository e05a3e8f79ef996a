"""What other libraries need to be told of AW layers. Each module imports its library when it is used."""
