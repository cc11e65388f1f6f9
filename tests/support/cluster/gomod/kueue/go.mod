module atelier.dev/tests/kueue

go 1.26.8

require sigs.k8s.io/kueue v0.12.2
