"""The HTTP server: what it answers, and what it refuses in one line."""


def recommend(server, **body):
    return server.client.post("/v1/recommend", json=body)


def test_try(server):
    print(recommend(server, user_id=1, n=3).json())
    print(recommend(server, history=[1, {"item_id": 3, "rating": 4}], n=3).json())
    print(recommend(server, history=[1, {"item_id": 3, "time_s": 4}], n=3).json())
    print(recommend(server, user_id=1, n=0).json())
    print(recommend(server, user_id=99).json())
    print(recommend(server).json())
    for path in (
        "/v1/items?query=item 1",
        "/v1/items/1",
        "/v1/similar?item_id=3&n=2",
        "/v1/users",
        "/v1/users/2",
        "/v1/nix",
        "/healthz",
        "/readyz",
        "/metrics",
    ):
        r = server.client.get(path)
        print(r.status_code, r.text[-1500:])
    print(server.said)
    1 / 0
