{{- define "pkd.name" -}}
{{ printf "%s-pkd" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- define "pkd.selector" -}}
app.kubernetes.io/name: pkd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "pkd.labels" -}}
{{ include "pkd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "pkd.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}
