"""The Ray Serve deployments: prefill and decode servers, and what hands a request between them."""
