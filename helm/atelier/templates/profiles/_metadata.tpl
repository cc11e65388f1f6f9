{{/*
Helm looks up every kind of a release before it makes the first object. So on the first installation, which brings the CRDs, profiles cannot be
objects of the release: a hook makes them after it. Helm never changes or deletes what a hook has made, nor can a release take such an
object over with other contents (Helm 3 compares custom resources with the last manifest, not with what is there). So the first
upgrade removes them and makes them anew, as objects of the release; runs that have begun do not notice.
*/}}

{{/* Whether profiles are made by a hook. "true" or nothing. */}}
{{- define "atelier.profilesByHook" -}}
{{- if and .Release.IsInstall .Values.crds.install (not (.Capabilities.APIVersions.Has "atelier.dev/v1alpha1/ClusterTrainingProfile")) -}}
true
{{- end -}}
{{- end -}}

{{/* Labels and annotations of a profile. */}}
{{- define "atelier.profileMetadata" -}}
labels:
  {{- include "atelier.labels" (list . "profiles") | nindent 2 }}
{{- if include "atelier.profilesByHook" . }}
annotations:
  helm.sh/hook: post-install,post-rollback
  # Without these Helm refuses to make the same object as one of the release.
  meta.helm.sh/release-name: {{ .Release.Name }}
  meta.helm.sh/release-namespace: {{ .Release.Namespace }}
{{- end }}
{{- end -}}

{{/* Removes a profile that a hook has made. Takes (list context hook kind namespace name spec). */}}
{{- define "atelier.profileRemoval" -}}
{{- $context := index . 0 }}
---
apiVersion: atelier.dev/v1alpha1
kind: {{ index . 2 }}
metadata:
  name: {{ index . 4 }}
  {{- with index . 3 }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "atelier.labels" (list $context "profiles") | nindent 4 }}
  annotations:
    helm.sh/hook: {{ index . 1 }}
    # The profile, then its copy, which is the same as long as it is there.
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  {{- toYaml (index . 5) | nindent 2 }}
{{- end -}}
