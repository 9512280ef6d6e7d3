"""Answer quality of visual token compression: our method and its peers on one model, one generate path, one table."""
