{{/* The release, with the chart's name in it. */}}
{{- define "atelier.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The operator's Deployment, Service, ServiceAccount, … and its Lease. */}}
{{- define "atelier.operator" -}}
{{- include "atelier.fullname" . }}-operator
{{- end -}}

{{/*
Roles have this name in every release: a second operator over the same namespaces would fight with the first one over every run, and
Helm refuses an object that belongs to another release.
*/}}
{{- define "atelier.role" -}}
atelier-operator
{{- end -}}

{{- define "atelier.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels of objects. Takes (list context component). */}}
{{- define "atelier.labels" -}}
{{- $context := index . 0 -}}
app.kubernetes.io/name: {{ $context.Chart.Name }}
app.kubernetes.io/instance: {{ $context.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ $context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $context.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $context.Chart.Name $context.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The operator's image; a digest wins over a tag. */}}
{{- define "atelier.image" -}}
{{- $image := .Values.operator.image -}}
{{- $repository := required "operator.image.repository is empty: build images/operator/Dockerfile, push it to your registry and name it there (docs/how-to/install-on-a-cluster.md)" $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* The namespaces of a namespaced operator, as a JSON object with one list, since templates give text only. */}}
{{- define "atelier.namespaces" -}}
{{- dict "names" (.Values.rbac.namespaces | default (list .Release.Namespace) | uniq | sortAlpha) | toJson -}}
{{- end -}}

{{/* For pods that pass Pod Security "restricted". */}}
{{- define "atelier.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "atelier.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
