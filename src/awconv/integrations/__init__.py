"""What other libraries need to be told of AW-convolutions; each module imports its library when it is used."""
