{{/* Whether there is a webhook: "true" or nothing. Its configuration lies outside of namespaces. */}}
{{- define "atelier.webhook" -}}
{{- if and .Values.webhook.enabled (eq .Values.rbac.scope "cluster") -}}
true
{{- end -}}
{{- end -}}

{{/* The Secret that the operator's pods mount. Helm's and cert-manager's have two names: neither takes over what belongs to the other. */}}
{{- define "atelier.webhookSecret" -}}
{{- if eq .Values.webhook.certificate "secret" -}}
{{- .Values.webhook.secret.name -}}
{{- else if eq .Values.webhook.certificate "certManager" -}}
{{- include "atelier.operator" . }}-webhook-tls
{{- else -}}
{{- include "atelier.operator" . }}-webhook
{{- end -}}
{{- end -}}

{{/* The names by which the API server calls it, as a JSON object with one list, since templates give text only. */}}
{{- define "atelier.webhookHosts" -}}
{{- $host := printf "%s.%s" (include "atelier.operator" .) .Release.Namespace -}}
{{- dict "names" (list (printf "%s.svc" $host) (printf "%s.svc.cluster.local" $host)) | toJson -}}
{{- end -}}
