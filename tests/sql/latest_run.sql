-- defn = MatViewDefinition.find_by!(name: "mv_user_activity")
-- MatViewRun.where(mat_view_definition_id: defn.id).order(created_at: :desc).first
SELECT "mat_view_runs".*
FROM "mat_view_runs"
WHERE "mat_view_runs"."mat_view_definition_id" = (
  SELECT "mat_view_definitions"."id" FROM "mat_view_definitions"
  WHERE "mat_view_definitions"."name" = 'mv_user_activity' LIMIT 1
)
ORDER BY "mat_view_runs"."created_at" DESC
LIMIT 1
