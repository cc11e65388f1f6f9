{{/*
What the operator may do in a namespace: the verbs that its code uses (operator/atelier_operator/cluster.py, and the watches of main.py),
no other. No Secrets, no exec, no logs, no wildcard.
*/}}
{{- define "atelier.rules" -}}
- apiGroups: [atelier.dev]
  resources: [trainingruns]
  verbs: [get, list, watch, delete] # get: one that has changed since it was seen; delete: ttlSecondsAfterFinished
- apiGroups: [atelier.dev]
  resources: [trainingruns/status]
  verbs: [patch]
- apiGroups: [atelier.dev]
  resources: [trainingruns/finalizers] # owner references that block deletion
  verbs: [update]
- apiGroups: [atelier.dev]
  resources: [trainingprofiles]
  verbs: [list, watch]
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, list, watch, create, delete]
- apiGroups: [batch]
  resources: [jobs] # where the cluster has no JobSet
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps, services]
  verbs: [get, create]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [resourcequotas]
  verbs: [list]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list, watch]
{{- end -}}
